"""Open-loop load on a running model server, with the model's own warmup requests.

    locust -f benchmarks/locustfile.py --headless --host 127.0.0.1:8500 \\
        --requests models/boston/1/assets.extra/tf_serving_warmup_requests \\
        --rate 300 --seconds 30 --record results/load.npz

Without ``--headless`` Locust serves its web page on http://127.0.0.1:8089, where the
options can be changed before each run; ``--web-host`` names another address.
``--processes 2`` divides the same schedule among two workers, each with a file of its
own. ``--otel`` exports what Locust measures by OpenTelemetry (``pip install
'locust[otel]'``). ``python benchmarks/locustfile.py --help`` explains the options:
``locust --help`` does not read the file. `spikeless bench run` drives the same load,
publishes a version in the middle of it and records what the server did.
"""

import sys

from spikeless.bench.load.locustfile import OneUserPerProcess, ReplayingUser

__all__ = ["OneUserPerProcess", "ReplayingUser"]

if __name__ == "__main__":
    from locust.main import main

    sys.argv[1:1] = ["-f", __file__]
    main()
