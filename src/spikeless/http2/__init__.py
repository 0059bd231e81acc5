"""HTTP/2 (RFC 9113) as gRPC uses it, without sockets.

frames   what both ends send, and the codes of errors
headers  header blocks (HPACK): each that repeats is coded once
end      what both ends of a connection do alike
client   a client's end

The server's end is the embedded engine's, with limits on what clients may ask:
`spikeless.engine.transport.http2`.
"""
