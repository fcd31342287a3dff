from loss_tqdm import *
