"""exporting/oci.py: the layout follows the image-spec, and config and manifest have model-runner's bytes."""

import hashlib
import json
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from exporting import oci
from exporting.oci import write_layout
from tests.exporting.gguf_files import MODIFIED, read_gguf, write_gguf

CREATED = datetime(2026, 1, 2, 3, 4, 5, 120_000, UTC)
# Written by hand as Go's encoding/json writes docker/model-runner's ConfigFile: fields in the order of the
# struct, maps sorted, < > & U+2028 escaped, six decimals for %f. model-runner's own builder (642c721) wrote
# the same bytes as write_layout for 60 random files of this kind. The array of 51 tokens is too long and that
# of 50 integers is not. The file has 51 * 64 + 7 + 7 = 3278 weights. Their 13,056 + 28 + 28 bytes, each
# padded to 32, are 13,120 = 12.8125 KiB.
CONFIG = (
    '{"config":{"format":"gguf","quantization":"MOSTLY_Q8_0","parameters":"3.28K",'
    '"architecture":"gemma3","size":"12.81KiB","gguf":{'
    '"gemma3.attention.layer_norm_rms_epsilon":"0.000001",'
    '"gemma3.attention.sliding_window_pattern":"true, false","gemma3.context_length":"32768",'
    '"gemma3.rope.freq_base":"1000000.000000","general.architecture":"gemma3","general.file_type":"7",'
    '"general.name":"Tiny \\u003cb\\u003e\\u0026\\u003c/b\\u003e",'
    '"general.type":"model","test.fifty":"0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,'
    " 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, "
    '31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49","test.halves":"0.500000,'
    ' 2.250000",'
    '"tokenizer.chat_template":"{{ \'\\u003cs\\u003e\' }}\\n\\tü\\u2028 \\"q\\" \\\\",'
    '"tokenizer.ggml.add_space_prefix":"false"},"context_size":32768},'
    '"descriptor":{"created":"2026-01-02T03:04:05.12Z"},"rootfs":{"type":"rootfs",'
    '"diff_ids":["sha256:%s","sha256:%s"]}}'
)
MANIFEST = (
    '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",'
    '"config":{"mediaType":"application/vnd.docker.ai.model.config.v0.1+json",'
    '"size":%d,"digest":"sha256:%s"},"layers":[{"mediaType":"application/vnd.docker.ai.gguf.v3",'
    '"size":%d,"digest":"sha256:%s","annotations":{'
    '"org.cncf.model.file.mediatype.untested":"false",'
    '"org.cncf.model.file.metadata+json":"{\\"name\\":\\"a \\\\u0026 b.gguf\\",\\"mode\\":416,\\"uid\\":0,'
    '\\"gid\\":0,\\"size\\":%d,\\"mtime\\":\\"2026-01-02T03:04:05.5Z\\",\\"typeflag\\":0}",'
    '"org.cncf.model.filepath":"a \\u0026 b.gguf"}},'
    '{"mediaType":"application/vnd.docker.ai.license","size":8,"digest":"sha256:%s",'
    '"annotations":{"org.cncf.model.file.mediatype.untested":"false",'
    '"org.cncf.model.file.metadata+json":"{\\"name\\":\\"LICENSE\\",\\"mode\\":420,\\"uid\\":0,'
    '\\"gid\\":0,\\"size\\":8,\\"mtime\\":\\"1970-01-01T00:00:07Z\\",'
    '\\"typeflag\\":0}","org.cncf.model.filepath":"LICENSE"}}]}'
)


@pytest.fixture(autouse=True)
def mask():
    """Makes new files have mode 644 on every machine."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def layout_of(
    tmp_path: Path, name: str = "a & b.gguf", licensed: bool = True, **extra
) -> tuple[Path, str, Path]:
    """Writes a layout; returns (layout, digest, GGUF file)."""
    gguf, license = write_gguf(tmp_path / name, **extra), tmp_path / "LICENSE"
    license.write_text("licence\n")
    os.utime(license, (7, 7))
    digest = write_layout(
        gguf, tmp_path / "layout", **read_gguf(gguf), license=license if licensed else None, created=CREATED
    )
    return tmp_path / "layout", digest, gguf


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


# bytes


def test_config_and_manifest_are_model_runners_to_the_byte(tmp_path):
    layout, digest, gguf = layout_of(tmp_path)
    weights, license = sha256(gguf.read_bytes()), sha256(b"licence\n")
    config = (CONFIG % (weights, license)).encode()
    manifest = (
        MANIFEST % (len(config), sha256(config), gguf.stat().st_size, weights, gguf.stat().st_size, license)
    ).encode()
    assert blob(layout, sha256(config)).read_bytes() == config
    assert blob(layout, digest).read_bytes() == manifest and digest == f"sha256:{sha256(manifest)}"


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1KB"),
        (1023, "1.02KB"),
        (1024, "1KiB"),
        (13120, "12.81KiB"),
        (1_000_000, "1MB"),
        (4_487_905, "4.28MiB"),
        (1_050_000_000, "1.05GB"),
        (2**30, "1GiB"),
        (3 * 2**40, "3TiB"),
        (10**15, "1PB"),
    ],
)
def test_sizes_are_written_as_gguf_parser_writes_them(bytes_, text):
    assert oci._scaled(bytes_, oci.BYTE_UNITS, "B") == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (4_201_000, "4.20M"),
        (268_098_176, "268.10M"),
        (999_880_000, "999.88M"),
        (27_009_002_240, "27.01B"),
    ],
)
def test_parameters_are_written_as_gguf_parser_writes_them(count, text):
    assert oci._scaled(count, oci.COUNT_UNITS, "") == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_000_000_001, "1970-01-01T00:00:01.000000001Z"),
        (MODIFIED, "2026-01-02T03:04:05.5Z"),
        (10**10, "1970-01-01T00:00:10Z"),
    ],
)
def test_times_have_no_more_decimals_than_they_need(nanoseconds, text):
    assert oci._go_time(nanoseconds) == text


def test_a_time_of_another_zone_is_the_same_instant(tmp_path):
    here = write_gguf(tmp_path / "x.gguf")
    facts = read_gguf(here)
    there = CREATED.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert write_layout(here, tmp_path / "a", **facts, created=CREATED) == write_layout(
        here, tmp_path / "b", **facts, created=there
    )


@pytest.mark.external
def test_json_is_what_gos_encoder_writes(tmp_path):
    """Encodes the same values with Go."""
    values = ["<a> & b", "\u2028\u2029", 'q" \\ /', "\n\r\t", "ü€😀", "\x7f", {"b": "1", "a<": "2"}]
    (tmp_path / "main.go").write_text(
        'package main\nimport ("encoding/json"; "os")\nfunc main() {\n\tvar v []any\n'
        "\tjson.NewDecoder(os.Stdin).Decode(&v)\n"
        "\tb, _ := json.Marshal(v)\n\tos.Stdout.Write(b)\n}\n"
    )
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(values).encode(),
        capture_output=True,
        timeout=120,
        env=os.environ
        | {
            "GOFLAGS": "-mod=mod",
            "GO111MODULE": "off",
            "HOME": str(tmp_path),
            "GOCACHE": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr.decode()
    assert oci._go_json([*values[:-1], dict(sorted(values[-1].items()))]) == done.stdout


# the image-spec


def check(value, rule, where="$"):
    """Asserts a rule with the keywords of the image-spec's schemas; a key that ends in "?" is optional."""
    if isinstance(rule, dict):
        assert isinstance(value, dict), where
        for key, inner in rule.items():
            name = key.removesuffix("?")
            assert name in value or key.endswith("?"), f"{where}.{name} is missing"
            if name in value:
                check(value[name], inner, f"{where}.{name}")
    elif isinstance(rule, list):
        assert isinstance(value, list) and value, where
        for i, item in enumerate(value):
            check(item, rule[0], f"{where}[{i}]")
    else:
        assert rule(value), f"{where} is {value!r}"


# opencontainers/image-spec, schema/: defs-descriptor, content-descriptor, image-manifest-schema,
# image-index-schema and image-layout-schema.json
def media_type(v):
    return isinstance(v, str) and re.fullmatch(
        r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", v, re.ASCII
    )


def size(v):
    return type(v) is int and 0 <= v < 2**63


def a_digest(v):
    return (
        isinstance(v, str)
        and re.fullmatch(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+", v)
        and re.fullmatch(r"sha256:[a-f0-9]{64}", v)
    )


def annotations(v):
    return isinstance(v, dict) and all(key and isinstance(text, str) for key, text in v.items())


def version_2(v):
    return type(v) is int and v == 2


DESCRIPTOR = {"mediaType": media_type, "size": size, "digest": a_digest, "annotations?": annotations}
SCHEMAS = {
    "oci-layout": {"imageLayoutVersion": lambda v: v == "1.0.0"},
    "index": {"schemaVersion": version_2, "mediaType": lambda v: v == oci.INDEX, "manifests": [DESCRIPTOR]},
    "manifest": {
        "schemaVersion": version_2,
        "mediaType": lambda v: v == oci.MANIFEST,
        "config": DESCRIPTOR,
        "layers": [DESCRIPTOR],
    },
}


@pytest.mark.parametrize("licensed", [True, False])
def test_the_layout_passes_the_image_specs_schema_and_every_descriptor_is_true(tmp_path, licensed):
    layout, digest, _ = layout_of(tmp_path, licensed=licensed)
    index, manifest = (
        json.loads((layout / "index.json").read_bytes()),
        json.loads(blob(layout, digest).read_bytes()),
    )
    check(json.loads((layout / "oci-layout").read_bytes()), SCHEMAS["oci-layout"])
    check(index, SCHEMAS["index"])
    check(manifest, SCHEMAS["manifest"])
    assert [m["digest"] for m in index["manifests"]] == [digest] and "artifactType" not in manifest
    described = [*index["manifests"], manifest["config"], *manifest["layers"]]
    assert {d["digest"] for d in described} == {
        f"sha256:{p.name}" for p in (layout / "blobs" / "sha256").iterdir()
    }
    for d in described:
        content = blob(layout, d["digest"]).read_bytes()
        assert (len(content), f"sha256:{sha256(content)}") == (d["size"], d["digest"])
    config = json.loads(blob(layout, manifest["config"]["digest"]).read_bytes())
    assert config["rootfs"] == {
        "type": "rootfs",
        "diff_ids": [layer["digest"] for layer in manifest["layers"]],
    }
    assert len(manifest["layers"]) == 1 + licensed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.pop("config"), "$.config is missing"),
        (lambda m: m.update(layers=[]), "$.layers"),
        (lambda m: m.update(schemaVersion="2"), "$.schemaVersion"),
        (lambda m: m["layers"][0].update(size=-1), "$.layers[0].size"),
        (lambda m: m["config"].update(digest="sha256:ABC"), "$.config.digest"),
        (lambda m: m["config"].update(mediaType="gguf"), "$.config.mediaType"),
        (lambda m: m["layers"][0]["annotations"].update(a=1), "$.layers[0].annotations"),
    ],
)
def test_the_schema_sees_what_is_wrong(tmp_path, spoil, message):
    layout, digest, _ = layout_of(tmp_path)
    manifest = json.loads(blob(layout, digest).read_bytes())
    spoil(manifest)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(manifest, SCHEMAS["manifest"])


@pytest.mark.external
def test_skopeo_reads_the_layout(tmp_path):
    layout, digest, gguf = layout_of(tmp_path)
    shown = json.loads(
        subprocess.run(
            ["skopeo", "inspect", "--raw", f"oci:{layout}"], capture_output=True, check=True, timeout=60
        ).stdout
    )
    assert (
        shown == json.loads(blob(layout, digest).read_bytes())
        and shown["layers"][0]["size"] == gguf.stat().st_size
    )


# files


def test_the_gguf_is_linked_not_copied(tmp_path):
    layout, _, gguf = layout_of(tmp_path)
    assert blob(layout, sha256(gguf.read_bytes())).samefile(gguf)


def test_without_links_the_gguf_is_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_links)
    layout, _, gguf = layout_of(tmp_path)
    copy = blob(layout, sha256(gguf.read_bytes()))
    assert not copy.samefile(gguf) and copy.read_bytes() == gguf.read_bytes()


def test_a_large_file_is_never_held_in_memory(tmp_path):
    """Exports a sparse file of 256 MiB in a process that may allocate only 64 MiB more."""
    code = """
import os, resource, sys
from pathlib import Path
from exporting import oci
folder = Path(sys.argv[1])
with (folder / "big.gguf").open("wb") as f:
    f.truncate(2**28)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
for link in (os.link, None):
    if link is None:
        def refuse(*_): raise OSError
        os.link = refuse
    metadata = {"general.architecture": "gemma3", "general.file_type": 0}
    out = folder / str(link is None)
    oci.write_layout(folder / "big.gguf", out, metadata=metadata, parameters=2**26, tensor_bytes=2**28)
"""
    done = subprocess.run(
        [os.sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "True" / "blobs" / "sha256").iterdir())) == 3


# refusals


def test_an_adapter_is_refused_with_the_remedy(tmp_path):
    gguf = write_gguf(tmp_path / "lora.gguf", type="adapter")
    with pytest.raises(ValueError, match="lora.gguf is an adapter.*merge it") as e:
        write_layout(gguf, tmp_path / "layout", **read_gguf(gguf))
    assert not (tmp_path / "layout").exists() and "\n" not in str(e.value)


def test_a_file_type_without_a_name_is_refused(tmp_path):
    gguf = write_gguf(tmp_path / "x.gguf", file_type=99)
    with pytest.raises(ValueError, match="general.file_type of the GGUF is 99.*Q8_0"):
        write_layout(gguf, tmp_path / "layout", **read_gguf(gguf))
    assert not (tmp_path / "layout").exists()
