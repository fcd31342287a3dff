from configuration_tqdm import *
