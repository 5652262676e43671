# The image of the operator, of heads and of workers: one binary and a PJRT plug-in.
#   cargo build --release && scripts/get-pjrt-cpu.sh && docker build -t foreshard .
# From a binary that is there already, on a base of your choice:
#   docker build --build-arg BASE=debian:bookworm-slim --build-arg BINARY=target/debug/foreshard -t foreshard .
ARG BASE=debian:bookworm-slim
# Where the certificates of authorities come from: archives and data are fetched over HTTPS, and a slim base has none.
ARG CERTIFICATES=debian:bookworm-slim
FROM ${CERTIFICATES} AS certificates
RUN [ -e /etc/ssl/certs/ca-certificates.crt ] || \
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends ca-certificates; }

FROM ${BASE} AS final
ARG BINARY=target/release/foreshard
ARG PLUGIN=.foreshard/plugins/xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so
COPY --from=certificates /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --chmod=0755 ${BINARY} /usr/local/bin/foreshard
COPY --chmod=0644 ${PLUGIN} /usr/local/lib/foreshard/xla_cpu_pjrt.so
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/foreshard"]
