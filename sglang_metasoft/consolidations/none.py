"""Nothing is done with dropped entries, as in most papers on eviction."""

from sglang_metasoft.consolidations.base import Consolidation


class Drop(Consolidation):
    """Kept entries stay as they were."""

    is_fused = True
