"""Cache projectors in closed form: ridge regression on normal equations that are summed while texts stream by."""

from .fit import FitOptions, fit_projector

__all__ = ["FitOptions", "fit_projector"]
