"""Pure tensor operations: product-key search, embedding bags, row gradients."""
