"""An OpenAI-compatible server over a dialled model in this process (extra: serve).

transformers' own serving handlers answer; they are given our loaded model instead of loading one. `turn` stands
between them and the model, `generate` between them and a client, `line` lets one request at a time in, `app` has the
routes, and `server` the socket. What the status and the page show is defined in `engines.page`, for every engine.
"""

from remoe_adapt.engines.serving.app import AppOptions, ServingApp
from remoe_adapt.engines.serving.server import Server
