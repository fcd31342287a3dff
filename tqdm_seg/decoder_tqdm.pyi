from decoder_tqdm import *
