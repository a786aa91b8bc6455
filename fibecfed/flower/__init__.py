"""FibecFed over Flower: a ServerApp and a ClientApp that say everything through WirePlan's messages.

In the pyproject.toml of a Flower app::

    [tool.flwr.app.components]
    serverapp = "fibecfed.flower.server_app:app"
    clientapp = "fibecfed.flower.client_app:app"

    [tool.flwr.app.config]    # any setting of a run, as in CONFIG.toml
    partition.devices = 3

A node that is started with ``data.source`` among its ``--node-config`` trains on that, and its data stays there. One
with ``partition-id`` (as Flower's simulation gives it) takes that part of the run's own ``data.source``.

Needs the extra ``fibecfed[flower]``. This is the only room that imports flwr.
"""
