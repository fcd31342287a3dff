from images_tqdm import *
