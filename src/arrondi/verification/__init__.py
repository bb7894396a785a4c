"""A file in the program that it is for, beside what its codes mean here: `verify_model`."""

from arrondi.verification.verify import verify_model

__all__ = ["verify_model"]
