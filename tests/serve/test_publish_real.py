"""What is published, read and sent by SAEDashboard's and Neuronpedia's own classes. Skipped where they are not there.

pip install --no-deps sae-dashboard==0.8.0 neuronpedia==1.2.1   (beside the extra `interop`, which has what they import;
sae-dashboard asks for older libraries than SAELens does)
"""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
from neuronpedia_site import KEY, Site
from serve_world import HOOK
from test_publish import MEMBER, SOURCE, make_run

from wsae.run import Run
from wsae.serve import upload
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index
from wsae.serve.neuronpedia import batches, latents, upload_body, write

MISSING = [n for n in ("sae_dashboard", "neuronpedia") if importlib.util.find_spec(n) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (beside extra interop)"),
    pytest.mark.filterwarnings("default"),
]


def test_their_classes_read_our_files_and_send_what_we_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit
    from neuronpedia.np_source import Source
    from neuronpedia.np_source_set import SourceSet
    from neuronpedia.requests.base_request import NPRequest
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    run = make_run(tmp_path)
    index = Index(ensure_index(run, None, IndexConfig())[0])
    member = index.by_slug[MEMBER]
    found = [*latents(index, member, Run(run).names[HOOK][MEMBER])]
    write(tmp_path / "out", found, member, SOURCE, 40)
    told = json.loads((tmp_path / "out/dashboard/batch-0.json").read_text())
    read = NeuronpediaDashboardBatch(**told)
    assert read.to_dict() == told
    assert len(read.features) == member.shown

    def rows(table):
        data = (tmp_path / f"out/export/tiny/{SOURCE.id}/{table}/batch-0.jsonl.gz").read_bytes()
        found = [json.loads(line) for line in gzip.decompress(data).decode().split("\n")[:-1]]
        return [
            {**row, "source": row["layer"]} for row in found
        ]  # the client's word for that column

    features = {}
    for row in rows("features"):
        up, down = (
            [Logit(*pair) for pair in zip(row[f"{s}_str"], row[f"{s}_values"], strict=True)]
            for s in ("pos", "neg")
        )
        features[row["index"]] = Feature(
            *(
                row["modelId"],
                row["layer"],
                int(row["index"]),
                row["frac_nonzero"],
                up,
                down,
                [],
                [],
            )
        )
    for row in rows("explanations"):
        features[row["index"]].explanations.append(Explanation.from_np_db_json(row))
    for row in rows("activations"):
        if row["binContains"] == -1:  # SAEDashboard's mark, no share
            row |= {"binMin": None, "binMax": None, "binContains": None}
        activation = Activation.from_np_db_json(row)
        features[row["index"]].activations.append(activation)

    monkeypatch.setenv(upload.KEY, KEY)
    site = Site()
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{site.url}/api")
    try:
        assert SourceSet.new(SOURCE.set, SOURCE.model, "ours").sources[1].id == SOURCE.id
        Source(SOURCE.id, SOURCE.model, SOURCE.set).upload_batch([*features.values()])
    finally:
        site.close()
    assert site.bodies == [upload_body(batch, SOURCE) for batch in batches(found)]
