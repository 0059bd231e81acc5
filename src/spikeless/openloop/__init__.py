"""Open-loop load on any gRPC or HTTP server, by itself or as a plug-in of Locust.

In: a schedule and calls as bytes. Out: what happened to each call. It depends on
nothing else of Spikeless but its errors and its HTTP/2, and knows nothing of models.

schedule    when calls leave, decided before the run
columns     what happened to each, in preallocated arrays
connection  a minimal gRPC client: one socket, unary calls as bytes
tls         TLS for it
http1       POST over HTTP/1.1 connections that are kept alive
link        what both are for the loop, and gRPC's
loop        the open loop in one thread
user        the same as a user of Locust, alone or with workers

Importing `user` imports Locust, which patches the standard library (gevent); the others
do not.
"""
