from .sparse import *
from .lean import *
from .logits import *
from .features import *
from .projected import *
from .relations import *
from .contrastive import *
from .check import *
