"""Sites: where a base model can change, found and named in any ``torch.nn.Module``."""

from finegraft.locate.collection import Sites
from finegraft.locate.find import sites
from finegraft.locate.site import Site

__all__ = ["Site", "Sites", "sites"]
