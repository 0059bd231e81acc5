"""Memory-mapped parameters: a hot reload that copies nothing.

In: any SavedModel. Out: a SavedModel whose large variables are not restored but mapped:
their storage is the page cache of files inside it, shared by every version and every
process that maps them. Loading it costs what its graph costs, whatever its parameters
weigh.

How it works
    A model's restore function reads each variable with ``RestoreV2`` and hands it to
    ``AssignVariableOp``. Here the variable gets ``ImmutableConst`` instead,
    TensorFlow's operation for a constant that is the memory of a file.
    ``AssignVariableOp`` adopts the tensor that it is given, so the mapping becomes the
    variable's storage; it is made once, at load. The serving functions do not change:
    they read the same variable.

    Each mapped file is a shard of the model's checkpoint that holds one tensor. So the
    checkpoint stays complete, nothing is on disk twice, and ``tf.saved_model.load``,
    which restores from the checkpoint, works as before.

Why it is safe
    * Mapped memory is read-only: writing to it would kill the server. So a variable is
      mapped only when every operation that its handle reaches, through calls, loops and
      branches, is known to only read (``plan``).
    * What a server cannot reach (training, saving, duplicates) is removed, so nobody
      can run it.
    * Sparse reads, which would copy the whole variable, become dense reads and lookups
      (``rewrite``).
    * The bytes are compared with the checkpoint's checksums, and the outputs of the two
      models with each other, bit by bit, before the result gets its name (``compare``).
    * A mapped file must never be changed or truncated while a server runs. They are
      read-only, named in ``assets.extra/spikeless.json`` with their digests, and
      checked before a version becomes visible.

The path of each file is written into the graph. It is absolute, and the one that the
*server* sees: see ``MapSettings.serving_root`` and ``repin``.
"""

from spikeless.mapping.manifest import MANIFEST_FILE as MANIFEST_FILE
from spikeless.mapping.manifest import Manifest as Manifest
from spikeless.mapping.manifest import VariableRecord as VariableRecord
from spikeless.mapping.manifest import check as check
from spikeless.mapping.manifest import check_files as check_files
from spikeless.mapping.manifest import is_mapped as is_mapped
from spikeless.mapping.manifest import read_manifest as read_manifest
from spikeless.mapping.plan import VariableState as VariableState
from spikeless.mapping.write import COPIED_BYTES as COPIED_BYTES
from spikeless.mapping.write import MapSettings as MapSettings
from spikeless.mapping.write import inspect as inspect
from spikeless.mapping.write import map_in_place as map_in_place
from spikeless.mapping.write import map_saved_model as map_saved_model
from spikeless.mapping.write import pinned_graph as pinned_graph
from spikeless.mapping.write import repin as repin
