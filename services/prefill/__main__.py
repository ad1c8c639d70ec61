"""`python -m services.prefill --config FILE --group group1`: one prefill instance."""

import sys

from services.engine_host import main

if __name__ == "__main__":
    sys.exit(main("prefill"))
