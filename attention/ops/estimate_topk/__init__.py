"""The keys with the largest estimated attention, for one new query and a length that is on the device."""

from .api import estimate_topk as estimate_topk
