"""What the memory slots are used for: accesses and what is computed from them."""
