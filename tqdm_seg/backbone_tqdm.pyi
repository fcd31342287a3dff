from backbone_tqdm import *
