{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := include "finetune-operator.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "finetune-operator.labels" -}}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The Secret with the certificate by which pods recognize the operator. */}}
{{- define "finetune-operator.tlsSecret" -}}
{{- default (printf "%s-progress-tls" (include "finetune-operator.fullname" .)) .Values.progress.tls.secretName }}
{{- end }}

{{/* Whether Helm makes the authority, with which the operator issues its certificates. */}}
{{- define "finetune-operator.ownAuthority" -}}
{{- $tls := .Values.progress.tls }}
{{- if not (or $tls.secretName $tls.certManager (.Capabilities.APIVersions.Has "cert-manager.io/v1")) }}true{{ end }}
{{- end }}

{{/* An image's full name. Takes [image values, default tag]. */}}
{{- define "finetune-operator.image" -}}
{{- $image := index . 0 }}
{{- $image.repository }}:{{ default (index . 1) $image.tag }}{{ if $image.digest }}@{{ $image.digest }}{{ end }}
{{- end }}

{{/* What a pod with the operator's image needs to be pulled and scheduled: the Deployment's and the test's. */}}
{{- define "finetune-operator.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the operator may do with jobs and their children; the same in all namespaces or in some. No secrets, no wildcard. */}}
{{- define "finetune-operator.rules" -}}
# patch: the finalizer of FineTuneJobs whose output is cleaned when they are deleted.
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs]
  verbs: [get, list, watch, patch]
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/status]
  verbs: [patch]
# Jobs and Services name their FineTuneJob as an owner whose deletion they block; the admission plugin
# OwnerReferencesPermissionEnforcement demands this right for that.
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
{{- if .Values.networkPolicy.jobs.enabled }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
{{- end }}
{{- $owned := list }}
{{- if not (has "*" .Values.tenants.serviceAccounts) }}{{ $owned = append $owned "serviceaccounts" }}{{ end }}
{{- if not (has "*" .Values.tenants.claims) }}{{ $owned = append $owned "persistentvolumeclaims" }}{{ end }}
{{- if $owned }}
# Their label says whether jobs may name them.
- apiGroups: [""]
  resources: {{ $owned | toJson }}
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [events]
  verbs: [list, create, patch]
{{- end }}

{{/* The variables that jobs may set, and which of them they may not: as in spec.pod.env of the CRD. */}}
{{- define "finetune-operator.allowedVariables" -}}
^((NCCL_|OFI_NCCL_|GLOO_|FI_|UCX_|RDMAV_|IBV_|MLX5_|TORCH_|PYTORCH_|CUDA_|CUBLAS_|CUDNN_|OMP_|KMP_|MKL_|HF_)[A-Za-z0-9_]+|HTTP_PROXY|HTTPS_PROXY|NO_PROXY|ALL_PROXY|http_proxy|https_proxy|no_proxy|all_proxy)$
{{- end }}
{{- define "finetune-operator.refusedVariables" -}}
^(CUDA_VISIBLE_DEVICES|HF_ENDPOINT|HF_HUB_OFFLINE|HF_TOKEN_PATH|OMP_NUM_THREADS|NCCL_CONF_FILE|NCCL_COMM_ID|NCCL_RAS_ADDR|HF_DEBUG|UCX_STATS_DEST|UCX_ERROR_MAIL_TO)$|_(PATHS?|HOME|DIR|DIRS|DIRECTORY|LIBS?|LIBRARY|LIBRARIES|DRIVERS?|CACHE|EXECUTABLE|EXE|COMMAND|CMD|PRELOAD|NVCC|CXX|COMPILER|BINARY|PROGRAM|SCRIPT|SOCKET)$|TRUST|UNSAFE|INSECURE|ALLOW_CODE|WEIGHTS_ONLY|VERIFY|ENDPOINT|OFFLINE|TELEMETRY
{{- end }}
