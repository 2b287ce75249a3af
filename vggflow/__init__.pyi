"What the top level offers, as type checkers and editors see it"

from .commands.report import write_report as write_report
from .judging.evaluation import evaluate as evaluate
from .judging.image_sets import read_images as read_images
from .judging.prompts import load_prompts as load_prompts
from .judging.rewards import get_reward as get_reward
from .judging.rewards import latent_reward as latent_reward
from .methods.costate import AdjointMatching as AdjointMatching
from .methods.costate import VGGFlowPMP as VGGFlowPMP
from .methods.direct import DRaFT as DRaFT
from .methods.direct import ReFL as ReFL
from .methods.method import Method as Method
from .methods.value_gradient import VGGFlow as VGGFlow
from .theory.control import gap_closed as gap_closed
from .theory.flow import FlowModel as FlowModel
from .theory.flow import GaussianFlow as GaussianFlow
from .theory.flow import MixtureFlow as MixtureFlow
from .theory.flow import Trajectory as Trajectory
from .theory.flow import sample as sample
from .theory.flow import time_grid as time_grid
from .theory.value import ValueGradient as ValueGradient
from .training.config import FinetuneConfig as FinetuneConfig
from .training.loop import finetune as finetune
from .training.rows import History as History
from .training.run_directory import RunDirectory as RunDirectory
from .worlds.lora import lora_settings as lora_settings
from .worlds.sd3 import SD3Flow as SD3Flow
from .worlds.world import load_flow as load_flow

__version__: str
