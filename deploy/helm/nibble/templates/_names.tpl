{{- define "nibble.name" -}}
{{- if contains "nibble" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-nibble" (.Release.Name | trunc 43 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "nibble.selector" -}}
app.kubernetes.io/name: nibble
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "nibble.labels" -}}
{{ include "nibble.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "nibble.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Where the catalog is: in a database that all replicas reach, or on the pod's own volume. */}}
{{- define "nibble.catalogOutside" -}}
{{- if or .Values.store.catalog .Values.store.catalogSecret.name }}yes{{ end }}
{{- end }}

{{- define "nibble.scaled" -}}
{{- if ne .Values.autoscaling.kind "none" }}yes{{ end }}
{{- end }}

{{/* Empty: the namespace's own. */}}
{{- define "nibble.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "nibble.name" .) "" .Values.serviceAccount.create) }}
{{- end }}

{{/* Said before anything is rendered: what would start, and then lose adapters. */}}
{{- define "nibble.check" -}}
{{- $many := or (gt (int .Values.replicas) 1) (include "nibble.scaled" .) }}
{{- if and $many (not (and .Values.store.blobs (include "nibble.catalogOutside" .))) }}
{{- fail "several replicas need one store: set store.blobs (s3://…) and store.catalog or store.catalogSecret, or replicas: 1 and autoscaling.kind: none" }}
{{- end }}
{{- if and (ne (ternary "yes" "" (ne .Values.store.blobs "")) (include "nibble.catalogOutside" .)) (not .Values.persistence.enabled) }}
{{- fail "one half of the store would be lost with the pod: without persistence.enabled set both store.blobs and store.catalog (or store.catalogSecret), or neither" }}
{{- end }}
{{- if and .Values.store.catalog .Values.store.catalogSecret.name }}
{{- fail "store.catalog and store.catalogSecret are both set: take one" }}
{{- end }}
{{- if and $many .Values.persistence.enabled (ne .Values.persistence.accessMode "ReadWriteMany") }}
{{- fail "several replicas cannot share a ReadWriteOnce volume: set persistence.enabled: false (with the store outside nothing of it is lost)" }}
{{- end }}
{{- if and .Values.ingress.enabled .Values.keys.open (not .Values.ingress.checkedBy) }}
{{- fail "keys.open and ingress.enabled: name in ingress.checkedBy what checks who asks, or leave keys.open off" }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.tlsSecret) (not .Values.ingress.tlsBy) }}
{{- fail "ingress.enabled without TLS: keys would go over the network as they are. Set ingress.tlsSecret, or name in ingress.tlsBy what ends TLS before it" }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parent.name) }}
{{- fail "gateway.enabled: set gateway.parent.name, the Gateway that the route belongs to" }}
{{- end }}
{{- if and .Values.gateway.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.from) }}
{{- fail "gateway.enabled: say in networkPolicy.from where the gateway's pods are, or none reaches a replica" }}
{{- end }}
{{- if and .Values.ingress.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.from) }}
{{- fail "ingress.enabled: say in networkPolicy.from where the ingress controller's pods are, or none reaches a replica" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.from) (not .Values.networkPolicy.metricsFrom) }}
{{- fail "serviceMonitor.enabled: say in networkPolicy.metricsFrom where Prometheus' pods are, or it reaches no replica" }}
{{- end }}
{{- if and (or .Values.store.blobs (include "nibble.catalogOutside" .)) .Values.networkPolicy.enabled (not .Values.networkPolicy.egress) }}
{{- fail "store.blobs and store.catalog are outside: say in networkPolicy.egress where, or no pod reaches them (examples/fleet.yaml has rules)" }}
{{- end }}
{{- if and .Values.gateway.enabled .Values.settings.protect_metrics }}
{{- fail "gateway.enabled and settings.protect_metrics: the endpoint picker reads /metrics without a key; leave protect_metrics off, the NetworkPolicy says who reaches it" }}
{{- end }}
{{- if and (eq (toString .Values.rollout.maxSurge) "0") (eq (toString .Values.rollout.maxUnavailable) "0") }}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could ever be replaced" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas (%d) is more than maxReplicas (%d)" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- end }}
{{- range $name := list "host" "port" "home" "blobs" "catalog" "drain_seconds" "open" "admin_key" "hf_token" "embedder_key" "reranker_key" }}
{{- if hasKey $.Values.settings $name }}
{{- fail (printf "settings.%s: the chart sets it, or it is a secret; see keys, store, drainSeconds, env and envSecrets" $name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A run of `training:`, its name in the cluster, and whether several processes share it. */}}
{{- define "nibble.training.check" -}}
{{- if gt (len .name) 60 }}
{{- fail (printf "training %s: the pods would be called %s-0, and a host name has 63 characters: a shorter name, or a shorter release" .run.name .name) }}
{{- end }}
{{- if and .run.sharded (or (not .many) (ne (dig "method" "kind" "lora" .run.config) "full")) }}
{{- fail (printf "training %s: sharded cuts the weights among nodes and processes, for method.kind full" .run.name) }}
{{- end }}
{{- end }}

{{/* /metrics names the adapters of all tenants: who comes through an Ingress needs a key for it. */}}
{{- define "nibble.metricsProtected" -}}
{{- if and (not .Values.keys.open) (dig "protect_metrics" .Values.ingress.enabled .Values.settings) }}yes{{ end }}
{{- end }}

{{/* A container sees all cores of its node, and would compute on each. */}}
{{- define "nibble.threads.env" -}}
{{- $own := dict }}
{{- range .env }}{{- $_ := set $own .name true }}{{- end }}
{{- $limit := dig "limits" "cpu" "" .resources }}
{{- if and (or $limit (dig "requests" "cpu" "" .resources)) (not (hasKey $own "OMP_NUM_THREADS")) }}
- name: OMP_NUM_THREADS
  valueFrom:
    resourceFieldRef:
      resource: {{ ternary "limits" "requests" (ne (toString $limit) "") }}.cpu
{{- end }}
{{- end }}

{{- define "nibble.keys.env" -}}
{{- if .Values.keys.open -}}
- name: NIBBLE_OPEN
  value: "true"
{{- else -}}
- name: NIBBLE_ADMIN_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.keys.admin.name }}
      key: {{ .Values.keys.admin.key }}
{{- end }}
{{- end }}

{{- define "nibble.store.env" -}}
{{- if .Values.store.blobs }}
- name: NIBBLE_BLOBS
  value: {{ .Values.store.blobs | quote }}
{{- end }}
{{- if .Values.store.catalogSecret.name }}
- name: NIBBLE_CATALOG
  valueFrom:
    secretKeyRef:
      name: {{ .Values.store.catalogSecret.name }}
      key: {{ .Values.store.catalogSecret.key }}
{{- else if .Values.store.catalog }}
- name: NIBBLE_CATALOG
  value: {{ .Values.store.catalog | quote }}
{{- end }}
{{- end }}

{{/* The root is read-only: caches of libraries go where something can be written. */}}
{{- define "nibble.home.env" -}}
- name: NIBBLE_HOME
  value: /data
- name: HOME
  value: /data
- name: HF_HOME
  value: /data/hub
{{- end }}

{{- define "nibble.pod.security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "nibble.container.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{- define "nibble.placement" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "nibble.resources" -}}
{{- $limits := .resources.limits | default dict | deepCopy }}
{{- if .gpu }}{{- $_ := set $limits .gpuResource (.gpus | default 1) }}{{- end }}
{{- with .resources.requests }}
requests: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $limits }}
limits: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
