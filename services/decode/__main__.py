"""`python -m services.decode --config FILE --group group1`: one decode instance."""

import sys

from services.engine_host import main

if __name__ == "__main__":
    sys.exit(main("decode"))
