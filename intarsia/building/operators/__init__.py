"""Merge operators, one file an operator or a family of them: weight arithmetic over tensors of one shape.

Each is registered with `intarsia.registry.merge_op`, and is all that there is to say of it: recipes, the search space
and `build` read the rest from its signature. The help reads these modules, so they import torch inside functions.
"""
