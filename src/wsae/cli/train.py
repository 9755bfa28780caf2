"""`wsae train`: a family of SAEs over the same batches."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from wsae.cli.flags import Common, Count, Flags as Base, Name, Number, Place
from wsae.cli.live import LiveFlags, open_data
from wsae.cli.ui import UI
from wsae.core.errors import UserError
from wsae.losses.config import GammaConfig, Normalise, Robust
from wsae.sae.config import Kind, make_activation
from wsae.train.config import MemberConfig, TrainConfig, family

ABOUT = "Train SAEs on activations: one per --alpha, and their plain twin, on the same batches."
