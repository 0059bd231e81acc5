"""Versions in a store that many machines share, and the way there and back.

In: a version on this machine's disk, and the URL of a store: an S3, GCS or Azure
bucket, a folder, SFTP, or HTTP for reading. Out: the version in the store (`push`), or
in a model repository on another machine's disk (`pull`), whole or not at all.

    <store>/models.config                    which versions a fleet serves
    <store>/.promotions/<number>.json        one record for each change of that
    <store>/.fleet/<node>.json               what a machine says of itself
    <store>/<model>/index.json               what a puller polls
    <store>/<model>/versions/<number>.json   one manifest for each version
    <store>/<model>/pieces/<digest>          content, named by its own SHA-256
    <store>/<model>/removed/<number>.json    manifests of versions that were removed

A file is cut into pieces of the same size. A piece that an earlier version has is not
stored again, and one that changed a little is stored as the difference to what was at
the same place in the version before (`spikeless.store.pieces`). Pieces are written
first and the manifest after all of them, so whoever finds a manifest finds everything
that it names.
"""
