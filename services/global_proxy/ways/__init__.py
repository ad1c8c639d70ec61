"""The ways of handing off: who tells whom what, and when."""
