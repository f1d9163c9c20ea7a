"""Several times faster `generate` for Hugging Face causal language models, by discrete-diffusion drafting.

The output stays that of plain `generate`: the same tokens when greedy, the same law when sampling.
"""

from transformers import AutoConfig
from transformers import AutoModel
from transformers import AutoModelForCausalLM

from hf_specdiff.attach import attach
from hf_specdiff.attach import detach
from hf_specdiff.core.budget import Profile
from hf_specdiff.core.candidate_generator import SpecDiffCandidateGenerator
from hf_specdiff.core.configuration_specdiff import SpecDiffConfig
from hf_specdiff.core.draft import Draft
from hf_specdiff.core.draft import DraftTree
from hf_specdiff.core.draft import Outcome
from hf_specdiff.core.drafters import DenoisingDrafter
from hf_specdiff.core.drafters import Drafter
from hf_specdiff.core.features import Features
from hf_specdiff.core.generate import generate
from hf_specdiff.core.modeling_specdiff import SpecDiffDrafter
from hf_specdiff.core.stats import SpeculationStats
from hf_specdiff.core.text import Text
from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts
from hf_specdiff.diffusion.drafter import DiffusionDrafter
from hf_specdiff.formats.exporting import export_drafter
from hf_specdiff.formats.loading import load_drafter
from hf_specdiff.hub import repository

__version__ = "0.1.0"
__all__ = [
    "DenoisingDrafter",
    "DiffusionDrafter",
    "Draft",
    "DraftTree",
    "Drafter",
    "Features",
    "Outcome",
    "Profile",
    "SpecDiffCandidateGenerator",
    "SpecDiffConfig",
    "SpecDiffDrafter",
    "SpeculationStats",
    "Text",
    "attach",
    "detach",
    "export_drafter",
    "generate",
    "load_demo",
    "load_drafter",
    "load_prompts",
]

AutoConfig.register("specdiff", SpecDiffConfig)
AutoModel.register(SpecDiffConfig, SpecDiffDrafter)
AutoModelForCausalLM.register(SpecDiffConfig, SpecDiffDrafter)
# Saved drafters carry their code, for users who have only transformers.
SpecDiffConfig.register_for_auto_class()
SpecDiffDrafter.register_for_auto_class("AutoModelForCausalLM")
# With the package, a saved drafter gets a card that follows it, and uploads leave others' files alone.
SpecDiffDrafter.hub = repository
