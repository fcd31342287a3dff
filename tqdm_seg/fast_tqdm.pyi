from fast_tqdm import *
