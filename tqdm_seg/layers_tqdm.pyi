from layers_tqdm import *
