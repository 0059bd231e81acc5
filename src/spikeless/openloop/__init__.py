"""Open-loop load on any gRPC server, by itself or as a plug-in of Locust.

In: a schedule and calls as bytes. Out: what happened to each call. It depends on
nothing else of Spikeless but its errors, and knows nothing of models.

schedule    when calls leave, decided before the run
columns     what happened to each, in preallocated arrays
connection  a minimal gRPC client: one socket, unary calls as bytes
loop        the open loop in one thread
user        the same as a user of Locust, alone or with workers

Importing `user` imports Locust, which patches the standard library (gevent); the others
do not.
"""
