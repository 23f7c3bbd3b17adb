"""The only folder that uses transformers' internals: interfaces, masks, cache classes, hooks.

An import has no side effect. ``install`` changes a model and returns the list of undo steps.
``inspect_model`` refuses a model that cannot be served before anything is changed. ``releases`` holds the
differences between the releases of transformers.
"""

from .cache import KVStoreLayer as KVStoreLayer
from .cache import adopt_cache as adopt_cache
from .cache import stored_by_tier as stored_by_tier
from .cache import stored_bytes as stored_bytes
from .caches import caches_of as caches_of
from .caches import check_saveable as check_saveable
from .caches import held as held
from .captured import check_static as check_static
from .converted import class_of_config as class_of_config
from .converted import converted_config as converted_config
from .converted import empty_converted as empty_converted
from .converted import read_config as read_config
from .converted import save_converted as save_converted
from .converted import specs_of as specs_of
from .cuts import Mark as Mark
from .cuts import cut as cut
from .cuts import cut_copy as cut_copy
from .cuts import forget_states as forget_states
from .cuts import last_cut as last_cut
from .cuts import length_of as length_of
from .cuts import mark as mark
from .cuts import needs_marks as needs_marks
from .encoders import put_encoder_mixers as put_encoder_mixers
from .generation import answer_by as answer_by
from .generation import extend as extend
from .generation import fill as fill
from .generation import generate_by as generate_by
from .generation import generation_settings as generation_settings
from .generation import greedy_config as greedy_config
from .generation import kept_config as kept_config
from .generation import streams as streams
from .head import Head as Head
from .hooks import Hook as Hook
from .install import install as install
from .mixers_in_place import dtype_of as dtype_of
from .mixers_in_place import mixers_of as mixers_of
from .mixers_in_place import stand_in as stand_in
from .models import FULL as FULL
from .models import SLIDING as SLIDING
from .models import ModelInfo as ModelInfo
from .models import inspect_model as inspect_model
from .models import is_patched as is_patched
from .models import join_ranks as join_ranks
from .models import place_beside as place_beside
from .observe import attend_densely as attend_densely
from .observe import observe as observe
from .observe import over_ranks as over_ranks
from .observe import replace_attention as replace_attention
from .projections import attention_weights as attention_weights
from .projections import geometry_of as geometry_of
from .releases import cache_name as cache_name
from .releases import returned_cache as returned_cache
from .releases import with_cache as with_cache
from .trial import check_by_trial as check_by_trial
from .trial import continues_exactly as continues_exactly
