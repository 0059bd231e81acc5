"""A model registry as a source: versions come from MLflow, and results go back.

In: a model URI of MLflow, such as ``models:/ctr@champion``. Out: a version in the model
repository that has passed the same gates as any other, tags on the registry's version,
and, where `AliasFollower` is asked to, a promotion.
"""

from spikeless.registry.following import AliasFollower as AliasFollower
from spikeless.registry.following import Followed as Followed
from spikeless.registry.following import Promotion as Promotion
from spikeless.registry.mlflow_models import is_uri as is_uri
from spikeless.registry.publishing import publish as publish
from spikeless.registry.tracking import Registry as Registry
from spikeless.registry.tracking import Release as Release
