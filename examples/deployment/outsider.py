"""What somebody without a key tries against a federation's server; prints each answer, exits 1 if anything was let in.

    outsider.py ADDRESS PORT CA SUPERLINK_PORT

Only the standard library: an attacker needs no umbel.
"""

import socket
import ssl
import sys
import urllib.error
import urllib.request

OPERATOR = ("list-runs", "list-nodes", "register-node", "start-run", "stop-run")


def status(url: str, context: ssl.SSLContext | None = None, body: bytes | None = None) -> str:
    """Returns the status of an answer, or why there is none."""
    request = urllib.request.Request(url, body, {"content-type": "application/protobuf"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=10) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except urllib.error.URLError as error:
        return f"none ({error.reason})"


def reachable(address: str, port: int) -> str:
    """Says whether a port takes a connection."""
    try:
        with socket.create_connection((address, port), timeout=3):
            return "open"
    except OSError as error:
        return f"none ({error.strerror or error})"


def main(address: str, port: str, ca: str, superlink: str) -> int:
    trusting = ssl.create_default_context(cafile=ca)
    https = f"https://{address}:{port}"
    tried = {
        "plain HTTP": status(f"http://{address}:{port}/v1/fleet/pull-messages", body=b""),
        "a CA that did not sign the server's certificate": status(https, ssl.create_default_context()),
        "a site's call without a key": status(f"{https}/v1/fleet/pull-messages", trusting, b""),
        "a call that registers a key by itself": status(f"{https}/v1/fleet/register-node", trusting, b""),
        "the SuperLink's own port from outside": reachable(address, int(superlink)),
    }
    tried |= {f"operator: {call}": status(f"{https}/v1/control/{call}", trusting, b"") for call in OPERATOR}
    # A path that only looks like one that is passed on.
    tried["operator: list-runs behind dots"] = status(f"{https}/v1/fleet/pull-messages/../../control/list-runs", trusting, b"")
    tried["operator: list-runs behind %2e"] = status(f"{https}/v1/fleet/%2e%2e/control/list-runs", trusting, b"")
    for what, answer in tried.items():
        print(f"  {what:<50} {answer}")
    return int(any(answer.startswith("2") or answer == "open" for answer in tried.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
