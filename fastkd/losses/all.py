from .logits import *
from .check import *
