"""The public names: one line here makes one public. `__init__.py` imports each on first use."""

from explib import engine as engine
from explib.data import load_data as load_data
from explib.errors import ParamError as ParamError
from explib.models import build as build
from explib.params import Params as Params
from explib.params import from_notebook as from_notebook
from explib.params import from_yaml as from_yaml
from explib.pruning.checkpoints import load as load
from explib.pruning.checkpoints import load_network as load_network
from explib.pruning.checkpoints import save as save
from explib.pruning.counting import macs as macs
from explib.pruning.counting import weights as weights
from explib.pruning.criteria import Layer as Layer
from explib.pruning.criteria import prune as prune
from explib.pruning.criteria import score as score
from explib.pruning.holding import hold as hold
from explib.pruning.holding import release as release
from explib.pruning.layers import find_convs as find_convs
from explib.pruning.masks import apply as apply
from explib.pruning.masks import masks_of as masks_of
from explib.pruning.masks import sparsity as sparsity
from explib.pruning.scores import delta_e as delta_e
from explib.pruning.scores import levels as levels
from explib.registry import register_criterion as register_criterion
from explib.registry import register_dataset as register_dataset
from explib.registry import register_network as register_network
from explib.training.evaluation import evaluate as evaluate
from explib.training.evaluation import recalibrate_bn as recalibrate_bn
from explib.training.finetuning import finetune as finetune

__version__: str
