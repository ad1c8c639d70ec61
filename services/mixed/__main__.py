"""`python -m services.mixed --config FILE --group group1`: one mixed instance."""

import sys

from services.engine_host import main

if __name__ == "__main__":
    sys.exit(main("mixed"))
