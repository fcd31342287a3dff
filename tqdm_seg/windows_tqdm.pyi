from windows_tqdm import *
