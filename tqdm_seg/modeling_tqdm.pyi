from modeling_tqdm import *
