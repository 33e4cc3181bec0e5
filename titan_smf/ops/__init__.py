"""Tensor functions without state: product-key search, weighted bags, their gradients, routing.

In and out: tensors, and process groups for those that exchange. Imports nothing else of the
package, and no torchtitan.
"""
