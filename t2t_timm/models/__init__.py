"""The models; importing this package registers them with timm."""
from .t2t_vit import *
from .t2t_vit_dense import *
