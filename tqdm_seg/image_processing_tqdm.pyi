from image_processing_tqdm import *
