from .sparse import *
from .logits import *
from .check import *
