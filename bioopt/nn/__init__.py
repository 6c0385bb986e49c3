"""Parts of networks that learning rules need and `torch.nn` has not."""

from .encoding import LatencyEncoding, PoissonEncoding, RateEncoding

__all__ = ["LatencyEncoding", "PoissonEncoding", "RateEncoding"]
