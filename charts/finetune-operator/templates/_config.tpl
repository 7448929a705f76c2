{{/* The operator's settings file (operator/finetune_operator/settings.py). Numbers through toJson: 1209600, not 1.2096e+06. */}}
{{- define "finetune-operator.config" -}}
trainerImage: {{ include "finetune-operator.image" (list .Values.trainer.image .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.trainer.image.pullPolicy }}
watchNamespaces: {{ .Values.watchNamespaces | toJson }}
leaderElection:
  enabled: true
  namespace: {{ .Release.Namespace | quote }}
  name: {{ include "finetune-operator.fullname" . | quote }}
  leaseSeconds: {{ .Values.leaderElection.leaseSeconds | toJson }}
  renewSeconds: {{ .Values.leaderElection.renewSeconds | toJson }}
  retrySeconds: {{ .Values.leaderElection.retrySeconds | toJson }}
progress:
  {{- if .Values.progress.enabled }}
  {{- if .Values.progress.tls.enabled }}
  certificate: /etc/finetune/tls
  certificateSeconds: {{ mul .Values.progress.tls.days 86400 }}
  {{- end }}
  url: {{ printf "%s://%s.%s.svc:8443" (ternary "https" "http" .Values.progress.tls.enabled) (include "finetune-operator.fullname" .) .Release.Namespace | quote }}
  port: 8443
  {{- else }}
  url: ""
  port: 0
  {{- end }}
  intervalSeconds: {{ .Values.progress.intervalSeconds | toJson }}
  writeEverySeconds: {{ .Values.progress.writeEverySeconds | toJson }}
  verifyAddress: {{ .Values.progress.verifyAddress }}
storage:
  s3:
    endpoint: {{ if .Values.storage.s3.endpoint }}{{ .Values.storage.s3.endpoint | quote }}{{ else }}null{{ end }}
    allowedEndpoints: {{ .Values.storage.s3.allowedEndpoints | toJson }}
    region: {{ .Values.storage.s3.region | quote }}
    allowHttp: {{ .Values.storage.s3.allowHttp }}
  gcs:
    endpoint: {{ if .Values.storage.gcs.endpoint }}{{ .Values.storage.gcs.endpoint | quote }}{{ else }}null{{ end }}
    allowHttp: {{ .Values.storage.gcs.allowHttp }}
    allowedEndpoints: {{ .Values.storage.gcs.allowedEndpoints | toJson }}
  azure:
    account: {{ .Values.storage.azure.account | quote }}
    endpoint: {{ if .Values.storage.azure.endpoint }}{{ .Values.storage.azure.endpoint | quote }}{{ else }}null{{ end }}
    allowHttp: {{ .Values.storage.azure.allowHttp }}
    allowedEndpoints: {{ .Values.storage.azure.allowedEndpoints | toJson }}
  hub:
    endpoint: {{ if .Values.storage.hub.endpoint }}{{ .Values.storage.hub.endpoint | quote }}{{ else }}null{{ end }}
models:
  cache:
    claim: {{ .Values.models.cache.claim | quote }}
    size: {{ .Values.models.cache.size | toString | quote }}
  allowedLicenses: {{ .Values.models.allowedLicenses | toJson }}
limits:
  requestsPerSecond: {{ .Values.limits.requestsPerSecond | toJson }}
  burst: {{ .Values.limits.burst | toJson }}
  workers: {{ .Values.limits.workers | toJson }}
pods:
  gracePeriodSeconds: {{ .Values.pods.gracePeriodSeconds | toJson }}
  metricsLingerSeconds: {{ .Values.pods.metricsLingerSeconds | toJson }}
  preflightCpu: {{ .Values.pods.preflightCpu | toString | quote }}
  preflightMemory: {{ .Values.pods.preflightMemory | toString | quote }}
  preflightNodeSelector: {{ .Values.pods.preflightNodeSelector | toJson }}
  preflightTolerations: {{ .Values.pods.preflightTolerations | toJson }}
  preflightRuntimeClassName: {{ .Values.pods.preflightRuntimeClassName | quote }}
  cleanupSeconds: {{ .Values.pods.cleanupSeconds | toJson }}
  cpuLimit: {{ .Values.pods.cpuLimit }}
  caBundle: {{ .Values.pods.caBundle | toJson }}
  allowedImages: {{ .Values.pods.allowedImages | toJson }}
  appArmorProfile: {{ .Values.pods.appArmorProfile | quote }}
  allowedCsiDrivers: {{ .Values.pods.allowedCsiDrivers | toJson }}
  gpusPerNode: {{ .Values.pods.gpusPerNode | toJson }}
  networkProfiles: {{ .Values.pods.networkProfiles | toJson }}
  tolerations: {{ .Values.pods.tolerations | toJson }}
  nodeSelector: {{ .Values.pods.nodeSelector | toJson }}
  schedulerName: {{ .Values.pods.schedulerName | quote }}
  runtimeClassName: {{ .Values.pods.runtimeClassName | quote }}
  imagePullSecrets: {{ .Values.pods.imagePullSecrets | toJson }}
  env: {{ .Values.pods.env | toJson }}
tenants: {{ omit .Values.tenants "maxJobs" "requireQuota" | toJson }}
networkPolicies:
  enabled: {{ .Values.networkPolicy.jobs.enabled }}
  metricsFrom: {{ .Values.networkPolicy.metricsFrom | default list | toJson }}
  egress: {{ include "finetune-operator.jobEgress" . }}
metricsPort: 9090
probesPort: 8081
sweepSeconds: {{ .Values.sweepSeconds | toJson }}
metricsRetentionSeconds: {{ .Values.metricsRetentionSeconds | toJson }}
logLevel: {{ .Values.logLevel }}
{{- end }}

{{/* The egress rules of jobs: those of the values, and the operator, to which pods report. */}}
{{- define "finetune-operator.jobEgress" -}}
{{- $rules := .Values.networkPolicy.jobs.egress }}
{{- if and $rules .Values.progress.enabled }}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) }}
{{- $pods := dict "matchLabels" (include "finetune-operator.selectorLabels" . | fromYaml) }}
{{- $rules = append $rules (dict "to" (list (dict "namespaceSelector" $namespace "podSelector" $pods)) "ports" (list (dict "port" 8443))) }}
{{- end }}
{{- $rules | toJson }}
{{- end }}
