"""Convert on the hosts of a Ray cluster unless that is done, then serve the artifact on them."""

from __future__ import annotations

from podquant.app.convert import is_done
from podquant.app.convert_on_ray import convert_on_ray
from podquant.app.serve import check_source, options_of
from podquant.app.serve_on_ray import check_host, serve_on_ray
from podquant.config.job import ConvertJob, ServeJob


def quantize_and_serve(conversion: ConvertJob, serving: ServeJob, *, address: str) -> None:
    """Both halves; what is wrong with the second is found before the first begins. Call it in the main thread.

    Args:
        address: of the cluster, as `ray.init` takes it.
    """
    options = options_of(serving)
    if is_done(conversion):
        print(f"{conversion.target}: is there already, and is served as it is")
    else:
        check_source(options, conversion.source, conversion.revision)
        check_host(serving, address=address)
        convert_on_ray(conversion, address=address)
    serve_on_ray(serving, address=address)
