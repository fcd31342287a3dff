from text_tqdm import *
