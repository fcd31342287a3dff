from fusion_tqdm import *
