#!/bin/bash
# Runs a command with CANN's own variables. Its scripts differ between releases, so they are read at each start; the
# driver's libraries are the host's, mounted.
for script in /usr/local/Ascend/{ascend-toolkit,cann,nnal/atb}/set_env.sh; do
    if [ -f "$script" ]; then
        # shellcheck disable=SC1090
        . "$script"
    fi
done
driver=/usr/local/Ascend/driver/lib64
export LD_LIBRARY_PATH="$driver/common:$driver/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$@"
