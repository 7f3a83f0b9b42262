"""How the two factors of a low-rank change start."""
