"""Ways to run a launch plan. Each backend is one module; `local` runs everything on this machine."""
